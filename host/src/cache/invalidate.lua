-- Invalidates tags of a worker, an invalidation that has an id once.
-- ARGV: how its names begin, the id, for how many milliseconds a tag version and an id are kept, the version before the transaction
-- read what it put, how many tags, the tags, the tags of each value it put (one a line).
-- Answers: the version, and for each of those values 1 when it was valid until now.
local name, id = ARGV[1], ARGV[2]
local tag_ms, id_ms, read_version, tags = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local version = tonumber(redis.call('GET', name .. 'version') or '0')

local function is_valid(tag)
    return tonumber(redis.call('GET', name .. 't:' .. tag) or '0') <= read_version
end
local answer = {''}
for n = 7 + tags, #ARGV do
    -- A version that is lower than it was is that of a store that lost everything.
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
        redis.call('SET', tag_key, text, 'PX', string.format('%.0f', math.max(redis.call('PTTL', tag_key), tag_ms)))
    end
end
answer[1] = string.format('%.0f', version)
return answer
