-- One change of one cached key, as one atomic step. What waited in an outbox during an outage must
-- not overwrite what was written since, so each change leaves a stamp beside its key.
--
-- KEYS[1]  the key
-- KEYS[2]  its stamp, in the same slot: "set touched", when it was last replaced (set, deleted)
--          and last changed in any way, in µs of the writers' clocks; it expires after the horizon
-- KEYS[3]  only of a replayed increment: a mark of its own, so that it is counted once
-- ARGV[1]  operation: set delete increment expire
-- ARGV[2]  stamp of this change, µs
-- ARGV[3]  horizon, ms: for how long a stamp is kept, and within which a change is replayed
-- ARGV[4]  "1": a replay of what was written during an outage; "0": a change as it happens
-- ARGV[5]  set: the value; increment: by how much
-- ARGV[6]  set, increment, expire: time to live, ms; "" none (increment: only given to a new key)
-- Reply: {verdict, value}. "done" with 1 or 0 (whether the key was there: delete, expire), or the
--        sum (increment); "newer": a replay that would have overwritten something newer;
--        "twice": a replayed increment that has been counted.
-- Errors: the commands' own. They are checked for before the first write.

local key, stamped, op, stamp = KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[2])
local horizon, replayed, value, ttl = ARGV[3], ARGV[4] == '1', ARGV[5], ARGV[6]

local set, touched = 0, 0
local known = redis.call('GET', stamped)
if known then
  local one, other = string.match(known, '^(%d+) (%d+)$')
  set, touched = tonumber(one) or 0, tonumber(other) or 0
end

if replayed then
  -- Increments add up with others; anything else would undo whatever came later.
  local latest = op == 'increment' and set or touched
  if latest > stamp then return {'newer', 0} end
  if op == 'increment' and redis.call('EXISTS', KEYS[3]) == 1 then return {'twice', 0} end
else
  -- The order in which changes arrive is the right one, whatever the writers' clocks say. Later
  -- than the one before, which may be waiting somewhere as well, because its answer got lost.
  stamp = math.max(stamp, touched + 1)
end

local answer = 1
if op == 'set' then
  if ttl == '' then redis.call('SET', key, value) else redis.call('SET', key, value, 'PX', ttl) end
elseif op == 'delete' then
  answer = redis.call('DEL', key)
elseif op == 'increment' then
  local fresh = ttl ~= '' and redis.call('EXISTS', key) == 0
  answer = redis.call('INCRBY', key, value)
  if fresh then redis.call('PEXPIRE', key, ttl) end
  if replayed then redis.call('SET', KEYS[3], '', 'PX', horizon) end
elseif op == 'expire' then
  answer = redis.call('PEXPIRE', key, ttl)
else
  return redis.error_reply('ERR unknown operation')
end

if op == 'set' or op == 'delete' then set = stamp end
redis.call('SET', stamped, string.format('%.0f %.0f', set, math.max(stamp, touched)), 'PX', horizon)
return {'done', answer}
