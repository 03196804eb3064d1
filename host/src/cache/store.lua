-- Stores values of a worker that are still valid.
-- ARGV: the worker's key prefix; its version before they were read. Then for each value: its key;
-- in milliseconds the remaining ttl, the full ttl and the stale part of it; its tags (one a line);
-- the value.
-- Returns the version.
local name, read_version = ARGV[1], tonumber(ARGV[2])
local version = redis.call('GET', name .. 'version') or '0'
-- A version lower than before means that the store lost all data, invalidations included.
if read_version > tonumber(version) then
    return version
end

-- Ensures that a tag has a version for as long as the value lives. False if the tag was
-- invalidated.
local function is_valid(tag, ms)
    local tag_key = name .. 't:' .. tag
    local number = redis.call('GET', tag_key)
    if number and tonumber(number) > read_version then
        return false
    end
    if not number then
        redis.call('SET', tag_key, '0', 'PX', ms)
    elseif redis.call('PTTL', tag_key) < ms then
        redis.call('PEXPIRE', tag_key, ms)
    end
    return true
end

for n = 3, #ARGV, 6 do
    local key, left, tags = ARGV[n], tonumber(ARGV[n + 1]), ARGV[n + 4]
    local valid = left > 0 and is_valid('', left)
    for tag in string.gmatch(tags, '[^\n]+') do
        valid = valid and is_valid(tag, left)
    end
    local there = redis.call('HGET', key, 'read_version')
    if valid and not (there and tonumber(there) > read_version) then
        redis.call('DEL', key)
        redis.call('HSET', key, 'value', ARGV[n + 5], 'tags', tags, 'read_version', ARGV[2],
            'ttl', ARGV[n + 2], 'stale', ARGV[n + 3])
        redis.call('PEXPIRE', key, left)
    end
end
return version
