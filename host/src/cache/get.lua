-- Reads the value of a key, if it is valid.
-- KEYS: the value, the worker's version. ARGV: the key prefix of its tag versions.
-- Returns the version, value and tags, then in milliseconds the remaining ttl, the full ttl, and
-- the stale part of it.
local version = redis.call('GET', KEYS[2]) or '0'
local nothing = {version, false, false, false, false, false}
local it = redis.call('HMGET', KEYS[1], 'value', 'tags', 'read_version', 'ttl', 'stale')
if not it[1] then
    return nothing
end
local read_version = tonumber(it[3])
local function is_valid(tag)
    local tag_version = redis.call('GET', ARGV[1] .. tag)
    return tag_version and tonumber(tag_version) <= read_version
end
if not is_valid('') then
    return nothing
end
for tag in string.gmatch(it[2], '[^\n]+') do
    if not is_valid(tag) then
        return nothing
    end
end
return {version, it[1], it[2], redis.call('PTTL', KEYS[1]), it[4], it[5]}
