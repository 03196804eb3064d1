-- Keeps values of a worker that are still valid.
-- ARGV: how its names begin, its count before they were read, and of each value: its name, in milliseconds what is left of
-- its life, its life, how much of that it is stale; its tags (one a line), and itself.
-- Answers: the count.
local name, began = ARGV[1], tonumber(ARGV[2])
local count = redis.call('GET', name .. 'count') or '0'
-- A count that is lower than it was is that of a store that lost everything, invalidations included.
if began > tonumber(count) then
    return count
end

-- Sees to it that there is a mark for a tag, for as long as the value lives. False when the tag was invalidated.
local function is_valid(tag, ms)
    local mark = name .. 't:' .. tag
    local number = redis.call('GET', mark)
    if number and tonumber(number) > began then
        return false
    end
    if not number then
        redis.call('SET', mark, '0', 'PX', ms)
    elseif redis.call('PTTL', mark) < ms then
        redis.call('PEXPIRE', mark, ms)
    end
    return true
end

for n = 3, #ARGV, 6 do
    local key, left, tags = ARGV[n], tonumber(ARGV[n + 1]), ARGV[n + 4]
    local valid = left > 0 and is_valid('', left)
    for tag in string.gmatch(tags, '[^\n]+') do
        valid = valid and is_valid(tag, left)
    end
    local there = redis.call('HGET', key, 'began')
    if valid and not (there and tonumber(there) > began) then
        redis.call('DEL', key)
        redis.call('HSET', key, 'value', ARGV[n + 5], 'tags', tags, 'began', ARGV[2],
            'life', ARGV[n + 2], 'stale', ARGV[n + 3])
        redis.call('PEXPIRE', key, left)
    end
end
return count
