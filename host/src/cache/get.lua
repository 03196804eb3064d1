-- The value of a key, if it is valid.
-- KEYS: the value, the worker's count. ARGV: how the names of its marks begin.
-- Answers: the count, value, tags, and in milliseconds what is left of its life, its life, how much of that it is stale.
local count = redis.call('GET', KEYS[2]) or '0'
local nothing = {count, false, false, false, false, false}
local it = redis.call('HMGET', KEYS[1], 'value', 'tags', 'began', 'life', 'stale')
if not it[1] then
    return nothing
end
local began = tonumber(it[3])
local function is_valid(tag)
    local mark = redis.call('GET', ARGV[1] .. tag)
    return mark and tonumber(mark) <= began
end
if not is_valid('') then
    return nothing
end
for tag in string.gmatch(it[2], '[^\n]+') do
    if not is_valid(tag) then
        return nothing
    end
end
return {count, it[1], it[2], redis.call('PTTL', KEYS[1]), it[4], it[5]}
