-- Invalidates tags of a worker, an invalidation that has an id once.
-- ARGV: how its names begin, the id, for how many milliseconds a mark and an id are kept, the count before the transaction
-- read what it put, how many tags, the tags, the tags of each value it put (one a line).
-- Answers: the count, and for each of those values 1 when it was valid until now.
local name, id = ARGV[1], ARGV[2]
local mark_ms, id_ms, began, tags = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local count = tonumber(redis.call('GET', name .. 'count') or '0')

local function is_valid(tag)
    return tonumber(redis.call('GET', name .. 't:' .. tag) or '0') <= began
end
local answer = {''}
for n = 7 + tags, #ARGV do
    -- A count that is lower than it was is that of a store that lost everything.
    local valid = began <= count and is_valid('')
    for tag in string.gmatch(ARGV[n], '[^\n]+') do
        valid = valid and is_valid(tag)
    end
    table.insert(answer, valid and 1 or 0)
end

if id == '' or redis.call('SET', name .. 'i:' .. id, '', 'NX', 'PX', id_ms) then
    local time = redis.call('TIME')
    count = math.max(count + 1, tonumber(time[1]) * 1000000 + tonumber(time[2]))
    local text = string.format('%.0f', count)
    redis.call('SET', name .. 'count', text)
    for n = 7, 6 + tags do
        local mark = name .. 't:' .. ARGV[n]
        redis.call('SET', mark, text, 'PX', string.format('%.0f', math.max(redis.call('PTTL', mark), mark_ms)))
    end
end
answer[1] = string.format('%.0f', count)
return answer
