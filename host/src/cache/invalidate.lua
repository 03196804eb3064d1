-- Invalidates tags of a worker. An invalidation with an id is applied only once.
-- ARGV: the worker's key prefix; the id; the ttl of tag versions and the ttl of ids, in
-- milliseconds; the version before the transaction read; the number of tags; the tags; for each
-- value put, its tags (one a line).
-- Returns the version, then 1 for each of those values that was valid until now, else 0.
local name, id = ARGV[1], ARGV[2]
local tag_ms, id_ms = tonumber(ARGV[3]), ARGV[4]
local read_version, tags = tonumber(ARGV[5]), tonumber(ARGV[6])
local version = tonumber(redis.call('GET', name .. 'version') or '0')

local function is_valid(tag)
    return tonumber(redis.call('GET', name .. 't:' .. tag) or '0') <= read_version
end
local answer = {''}
for n = 7 + tags, #ARGV do
    -- A version lower than before means that the store lost all data.
    local valid = read_version <= version and is_valid('')
    for tag in string.gmatch(ARGV[n], '[^\n]+') do
        valid = valid and is_valid(tag)
    end
    table.insert(answer, valid and 1 or 0)
end

if id == '' or redis.call('SET', name .. 'i:' .. id, '', 'NX', 'PX', id_ms) then
    local time = redis.call('TIME')
    version = math.max(version + 1, tonumber(time[1]) * 1000000 + tonumber(time[2]))
    local text = string.format('%.0f', version)
    redis.call('SET', name .. 'version', text)
    for n = 7, 6 + tags do
        local tag_key = name .. 't:' .. ARGV[n]
        local ttl = math.max(redis.call('PTTL', tag_key), tag_ms)
        redis.call('SET', tag_key, text, 'PX', string.format('%.0f', ttl))
    end
end
answer[1] = string.format('%.0f', version)
return answer
