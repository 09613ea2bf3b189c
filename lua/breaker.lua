-- The state machine of one circuit, as one atomic step: load, step, save.
-- The twin of distributed_breaker/model.py: the same functions, under the same names, in the same
-- order, each opening with the rules it keeps. A change of one is a change of the other; the tests
-- in tests/equivalence compare them state by state. README.md beside this file is the wire spec.
--
-- KEYS[1]  cb:{<namespace>:<circuit>}        hash: the circuit
-- KEYS[2]  cb:{<namespace>:<circuit>}:log    stream: its last transitions
-- ARGV[1]  operation: report acquire settle cancel override release reset
-- ARGV[2]  now in ms; empty: the server's TIME
-- ARGV[3]  nonce, 8 hexadecimal digits
-- ARGV[4]  channel of the pushes
-- ARGV[5]  name of the circuit, as it is pushed
-- ARGV[6]  known: "v nonce state remaining attempt"
-- ARGV[7]  policy that the client holds
-- ARGV[8]  "1": the policy is offered, "0": it is only used where the store has none
-- ARGV[9…] by operation:
--   report    era "v nonce", reporter, batch, deltas, detail
--   acquire   token
--   settle    era "v nonce", token, kind, open_for, deltas, detail
--   cancel    token
--   override  kind, ttl in ms or -1, detail
--   release   detail
--   reset     detail
-- Reply: {header, now, remaining, old state, cause, verdict, value, policy, failed}, all text.
-- Errors: CBARG (an argument is malformed), CBSCHEMA (a newer schema), CBCORRUPT (not a circuit).
-- Everything is checked before the first write, HSET is the last command that can undo a step,
-- and log, expiry and push follow under pcall: Redis does not roll back a script.

local SCHEMA = 1
local BUCKETS = 12
local REPORTERS = 8
local HOUR = 3600000
local WEEK = 7 * 24 * HOUR
local FRESH = 10000
local FRESH_MARGIN = 250
local ACTIVE = 60000
local MAX_ATTEMPT = 64
local MAX_DENY = 500
local MAX_TOKENS = 512
local MAX_BAD = 1024
local MAX_COUNT = 65536
local MAX_NUMBER = 9000000000000000
local MAX_TIME = 253402300799999
local MAX_SPAN = 1000000000000
local MAX_NAME = 24
local MAX_DETAIL = 400
local MAX_POLICY = 256
local LOG_LENGTH = 50

-- ------------------------------------------------------------------------- reading

-- A command's error, beginning with its code. Redis 6.2 puts the script's name before it; a
-- missing right has no code of its own inside a script, so it gets one that clients can tell.
local function refusal(err)
  local plain = string.gsub(string.gsub(err, '^@%S+: %d+: ', ''), '^%-', '')
  if string.find(plain, '^ERR') then return 'CBREFUSED' .. string.sub(plain, 4) end
  return plain
end

-- What is stored and the server's time are asked for once, by whoever needs them first. pcall keeps
-- the code of an error, such as WRONGTYPE, which Redis before 7 hides behind ERR when a script fails.
local stored, clock

local function read_stored()
  stored = stored or redis.pcall('HMGET', KEYS[1], 'h', 'w', 'r', 's', 'p', 't', 'x', 'e')
  return stored
end

local function read_clock()
  clock = clock or redis.pcall('TIME')
  return clock
end

-- ------------------------------------------------------------------------- the shortcut

-- Nearly every step is a report of a process that agrees with the store about a closed circuit, and
-- trips nothing. Such a step is carried out here, on the packed text, before the machine below is
-- even defined, which would take as long again. What is not certain is left to the machine, before any
-- write, and the tests compare the two. The functions return nil for what is not certain. They take
-- lists apart by tokens with the blank behind them, and add up their lengths: nothing stood between.

local find, match, gmatch, gsub = string.find, string.match, string.gmatch, string.gsub
local format, floor, max = string.format, math.floor, math.max

-- As text() below, quicker: %d is a C long, which has 32 bits on some servers.
local function digits(number)
  return format(number < 2147483648 and '%d' or '%.0f', number)
end

-- A number in its text, and what is added to it: most do not change.
local function grown(number, by)
  return by == 0 and number or digits(number + by)
end

-- Adds what only the client can count to the totals, which stay text.
local function steady_deltas(totals, deltas)
  local read, tokens = 0, 0
  for name, bucket, count in gmatch(deltas .. ' ', '([%a_]+)(%d*):(%d+) ') do
    local index
    if bucket ~= '' then
      index = name == 'b' and 17 + bucket
    else
      index = name == 'duration_us' and 16 or name == 'rejected' and 5 or name == 'dropped' and 7
        or name == 'fallbacks' and 9
    end
    tokens = tokens + 1
    if not index or index > 32 or #count > 15 or tokens > 32 then return nil end
    totals[index] = digits(totals[index] + count)
    read = read + #name + #bucket + #count + 2
  end
  return deltas == '' or read == #deltas + 1 and not find(deltas, '[b:]0%d')
end

-- Whether the table is full of reporters that are active: another one with good outcomes needs no
-- place in it.
local function crowded(shares, horizon)
  local others = 0
  for last in gmatch(shares, ':(%d+):%d+:%d+:') do
    if last + 0 >= horizon then others = others + 1 end
  end
  return others >= REPORTERS
end

-- Records a batch in window, reporters and totals, and returns the first two; nil where a rule of
-- the trip might hold after any of its outcomes, whatever the quorum says.
local function steady_batch(w, r, totals, now, moment)
  local most_run, rate, window, least, slow_rate =
    match(ARGV[7], '^%d+ (%d+) (%d+) (%d+) (%d+) (%d+) ')
  local head, run, calls, failures, slow, ring = match(w, '^(%d+) (%d+) (%d+) (%d+) (%d+)(.*)')
  local half, shares = match(r, '^(%d+)( .*)')
  if not (most_run and head and half) then return nil end

  -- Neither the ring nor the half-windows move on.
  local reporter = ARGV[10]
  if head + 0 ~= floor(now / max(1, floor(window / BUCKETS)))
    or half + 0 ~= floor(now / max(1, floor(window / 2)))
    or #reporter > MAX_NAME or not find(reporter, '^[%w_-]+$') or find(shares, ' *:', 1, true) then
    return nil
  end
  local from, to = find(shares, ' ' .. reporter .. ':', 1, true)
  local before, own, behind, cur, prev = shares, '0', ''
  if from then
    before = string.sub(shares, 1, from - 1)
    cur, prev, own, behind = match(shares, '^%d+:(%d+):(%d+):(%d+)(.*)', to + 1)
    if not cur then return nil end
  elseif not crowded(shares, now - max(ACTIVE, window)) then
    return nil
  end
  local n, f, s, older = match(ring, '^ 0:(%d+):(%d+):(%d+)(.*)')
  if not n then n, f, s, older = '0', '0', '0', ring end

  rate, least, slow_rate, most_run = rate + 0, least + 0, slow_rate + 0, most_run + 0
  local sum, streak, mine, tokens, all, read = calls + 0, run + 0, own + 0, 0, 0, 0
  local bad, failed, slower, ignored, good, succeeded = 0, 0, 0, 0, false, false
  for kind, number in gmatch(ARGV[11] .. ' ', '([sSfFiI])([1-9]%d*) ') do
    local count = number + 0
    read, tokens, all = read + #number + 2, tokens + 1, all + count
    if count > MAX_COUNT or tokens > MAX_TOKENS then return nil end
    if kind == 'i' then
      ignored = ignored + count
    else
      -- Calls that are not bad by a rule lower its rate, so it is highest with the fewest of them
      -- with which it counts at all; bad ones raise it up to the last.
      sum = sum + count
      local first = max(least, sum - count + 1)
      local among, slow_among = first, first
      if kind == 's' then
        good, succeeded, streak, mine = true, true, 0, 0
      else
        bad, streak, mine = bad + count, streak + count, mine + count
        if kind == 'S' then succeeded = true end
        if kind == 'I' then ignored = ignored + count end
        if kind == 'f' or kind == 'F' then failed, among = failed + count, sum end
        if kind ~= 'f' then slower, slow_among = slower + count, sum end
      end
      if streak >= most_run or bad > MAX_BAD or sum >= least
        and (rate > 0 and (failures + failed) * 10000 >= rate * among
        or (slow + slower) * 10000 >= slow_rate * slow_among) then
        return nil
      end
    end
  end
  if read ~= #ARGV[11] + 1 or bad > 0 and not from then return nil end
  totals[1] = digits(totals[1] + all)
  totals[2], totals[3] = grown(totals[2], failed), grown(totals[3], slower)
  totals[4] = grown(totals[4], ignored)
  if succeeded then totals[14] = moment end
  if failed > 0 then totals[15] = moment end
  if not succeeded and bad == 0 then return w, r end
  if good and run ~= '0' then
    -- A good call ends the run of every reporter.
    before = gsub(gsub(before, ':%d+ ', ':0 '), ':%d+$', ':0')
    behind = gsub(gsub(behind, ':%d+ ', ':0 '), ':%d+$', ':0')
  end
  local share = from and ' ' .. reporter .. ':' .. moment .. ':' .. grown(cur, bad) .. ':' .. prev
    .. ':' .. digits(mine) or ''
  return head .. ' ' .. digits(streak) .. ' ' .. digits(sum) .. ' ' .. grown(failures, failed)
      .. ' ' .. grown(slow, slower) .. ' 0:' .. digits(n + sum - calls) .. ':' .. grown(f, failed)
      .. ':' .. grown(s, slower) .. older,
    half .. before .. share .. behind
end

local function steady()
  if ARGV[1] ~= 'report' or not ARGV[13] then return nil end
  local raw = read_stored()
  -- After an error there are none of these.
  if not (raw[1] and raw[2] and raw[3] and raw[6]) or raw[5] ~= ARGV[7] then return nil end

  -- Of the header only the counter changes. The client knows this generation; if it is another one,
  -- or the header no plain one, then era is not the client's.
  local head, era, since, attempt, n, cause =
    match(raw[1], '^(1 (%d+ %x+) closed (%d+) %d+ (%d+) 0 %-) (%d+) (%S+)$')
  if ARGV[9] ~= era or ARGV[6] ~= era .. ' closed 0 ' .. attempt
    or (ARGV[8] ~= '0' and ARGV[8] ~= '1') or #ARGV[13] > MAX_DETAIL
    or not find(ARGV[3], '^%x%x%x%x%x%x%x%x$') then
    return nil
  end
  local now
  if ARGV[2] ~= '' then
    now = find(ARGV[2], '^[1-9]%d*$') and #ARGV[2] < 15 and tonumber(ARGV[2])
  else
    local t = read_clock()
    now = not t.err and t[1] * 1000 + floor(t[2] / 1000)
  end
  local touched = tonumber(raw[8])
  if not now or not touched or now < touched or now >= touched + HOUR or now < since + 0 then
    return nil
  end
  local moment = digits(now)
  local answer = {raw[1], moment, '0', 'closed', '', 'ok', '0', '', ''}
  if ARGV[11] == '' and ARGV[12] == '' then return answer end

  local totals = {match(raw[6],
    '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)'
    .. ' (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')}
  local w, r = raw[2], raw[3]
  if not totals[1] or not steady_deltas(totals, ARGV[12]) then return nil end
  if ARGV[11] ~= '' then
    w, r = steady_batch(w, r, totals, now, moment)
    if not w then return nil end
  end
  answer[1] = head .. ' ' .. digits(n + 1) .. ' ' .. cause
  local saved = redis.pcall('HSET', KEYS[1], 'h', answer[1], 'w', w, 'r', r, 't',
    table.concat(totals, ' '))
  if type(saved) == 'table' then return redis.error_reply(refusal(saved.err)) end
  return answer
end

local answer = steady()
if answer then return answer end

-- ------------------------------------------------------------------------- the machine's tables

local NAMES = {
  'calls', 'failures', 'slow', 'ignored', 'rejected', 'late', 'dropped', 'probes', 'fallbacks',
  'trips', 'opens', 'half_opens', 'closes', 'last_success', 'last_failure', 'duration_us',
  'b0', 'b1', 'b2', 'b3', 'b4', 'b5', 'b6', 'b7', 'b8', 'b9', 'b10', 'b11', 'b12', 'b13', 'b14',
  'b15',
}
local INDEX = {}
for i, name in ipairs(NAMES) do INDEX[name] = i end

-- Totals that only clients can count; the script counts the others.
local CLIENT_COUNTS = {rejected = true, dropped = true, fallbacks = true, duration_us = true}
for i = 0, 15 do CLIENT_COUNTS['b' .. i] = true end

-- The numbers of a policy in their order, each with its least and greatest value.
local POLICY = {
  {'version', 0, MAX_NUMBER}, {'failure_threshold', 1, 1000000}, {'failure_rate', 0, 10000},
  {'window', 1, 86400000}, {'minimum_calls', 1, 1000000}, {'slow_call_rate', 1, 10000},
  {'open_interval', 1, 2592000000}, {'open_interval_max', 0, 2592000000},
  {'backoff_multiplier', 100, 10000}, {'jitter', 0, 10000}, {'success_threshold', 1, 1000},
  {'half_open_permits', 1, 16}, {'permit_lease', 1, 86400000}, {'quorum', 1, 8},
}

local STATES = {
  closed = true, open = true, half_open = true, forced_open = true, forced_closed = true,
}

-- ------------------------------------------------------------------------- packed text

-- tostring keeps 14 digits only, too few for times that are multiplied.
local function text(number)
  return string.format('%.0f', number)
end

local function div(a, b)
  return math.floor(a / b)
end

-- Whole numbers in their one usual form: tonumber would also take 1e3, 0x10, 1.5 and 007.
local function whole(value, least, most)
  if type(value) ~= 'string' then return nil end
  if value ~= '0' and not string.find(value, '^%-?[1-9]%d*$') then return nil end
  local number = tonumber(value)
  if number < least or number > most then return nil end
  return number
end

local function split(line, pattern)
  local parts = {}
  for part in string.gmatch(line, pattern) do parts[#parts + 1] = part end
  return parts
end

-- A newer schema is refused, never guessed at. Words behind the known ones are ignored, and gone
-- with the next write: what a newer library adds goes into hash fields of its own.
local function load_header(line)
  local p = split(line, '%S+')
  local schema = whole(p[1], 0, MAX_NUMBER)
  if schema and schema > SCHEMA then
    return nil, 'CBSCHEMA the circuit has schema ' .. p[1] .. ', this library knows ' .. SCHEMA
  end
  local c = {
    v = whole(p[2], 0, MAX_NUMBER), nonce = p[3], state = p[4], since = whole(p[5], 0, MAX_NUMBER),
    duration = whole(p[6], -1, MAX_NUMBER), attempt = whole(p[7], 0, MAX_NUMBER),
    successes = whole(p[8], 0, MAX_NUMBER), fresh = p[9] == 'f', n = whole(p[10], 0, MAX_NUMBER),
  }
  if not schema or not STATES[p[4]] or not (c.v and c.since and c.duration and c.attempt
    and c.successes and c.n) then
    return nil, 'CBCORRUPT the circuit\'s header cannot be read'
  end
  return c
end

-- nil for a text that is not a policy or out of range: such a one counts as absent.
local function load_policy(line)
  local parts, p = split(line, '%S+'), {}
  if #line > MAX_POLICY or table.concat(parts, ' ') ~= line then return nil end
  for i, rule in ipairs(POLICY) do
    local name, least, most = unpack(rule)
    p[name] = whole(parts[i], least, most)
    if not p[name] then return nil end
  end
  p.text = line
  return p
end

local function empty_ring()
  local ring = {}
  for i = 1, BUCKETS do ring[i] = {0, 0, 0} end
  return ring
end

-- An absent circuit is nil; absent fields are empty.
local function load()
  local raw = read_stored()
  if raw.err then return nil, refusal(raw.err) end
  if not raw[1] then return nil end
  local c, problem = load_header(raw[1])
  if not c then return nil, problem end
  c.ring, c.reporters, c.slots, c.totals = empty_ring(), {}, {}, {}
  local window = split(raw[2] or '0 0', '%S+')
  c.head, c.run = tonumber(window[1]), tonumber(window[2])
  for i = 6, #window do
    local offset, calls, failures, slow = string.match(window[i], '^(%d+):(%d+):(%d+):(%d+)$')
    c.ring[tonumber(offset) + 1] = {tonumber(calls), tonumber(failures), tonumber(slow)}
  end
  local shares = split(raw[3] or '0', '%S+')
  c.half = tonumber(shares[1])
  for i = 2, #shares do
    local id, last, cur, prev, run = string.match(shares[i], '^([^:]+):(%d+):(%d+):(%d+):(%d+)$')
    c.reporters[i - 1] = {
      id = id, last = tonumber(last), cur = tonumber(cur), prev = tonumber(prev),
      run = tonumber(run),
    }
  end
  for i, entry in ipairs(split(raw[4] or '', '%S+')) do
    local token, since, lease = string.match(entry, '^([^:]+):(%d+):(%d+)$')
    c.slots[i] = {token = token, since = tonumber(since), lease = tonumber(lease)}
  end
  c.policy = load_policy(raw[5] or '')
  local totals = split(raw[6] or '', '%S+')
  for i = 1, #NAMES do c.totals[i] = tonumber(totals[i] or '0') end
  c.reason = raw[7] or ''
  c.touched = tonumber(raw[8] or '0')
  return c
end

-- S8: the window's totals are the sum of its ring.
local function counts(c)
  local calls, failures, slow = 0, 0, 0
  for _, bucket in ipairs(c.ring) do
    calls = calls + bucket[1]
    failures = failures + bucket[2]
    slow = slow + bucket[3]
  end
  return calls, failures, slow
end

-- Schema, generation, nonce, state, since, duration, attempt, successes, flags, counter, and the
-- cause of the last transition, which stands first in the reason.
local function dump_header(c)
  return table.concat({
    SCHEMA, text(c.v), c.nonce, c.state, text(c.since), text(c.duration), text(c.attempt),
    text(c.successes), c.fresh and 'f' or '-', text(c.n),
    string.match(c.reason, '^%S+') or '-',
  }, ' ')
end

-- Only buckets that hold something are written, newest first.
local function dump(c)
  local calls, failures, slow = counts(c)
  local window = {text(c.head), text(c.run), text(calls), text(failures), text(slow)}
  for i, b in ipairs(c.ring) do
    if b[1] > 0 then
      window[#window + 1] = table.concat({i - 1, text(b[1]), text(b[2]), text(b[3])}, ':')
    end
  end
  local shares = {text(c.half)}
  for _, r in ipairs(c.reporters) do
    shares[#shares + 1] =
      table.concat({r.id, text(r.last), text(r.cur), text(r.prev), text(r.run)}, ':')
  end
  local slots = {}
  for i, s in ipairs(c.slots) do
    slots[i] = table.concat({s.token, text(s.since), text(s.lease)}, ':')
  end
  local totals = {}
  for i = 1, #NAMES do totals[i] = text(c.totals[i]) end
  return {
    'h', dump_header(c), 'w', table.concat(window, ' '), 'r', table.concat(shares, ' '),
    's', table.concat(slots, ' '), 'p', c.policy.text, 't', table.concat(totals, ' '),
    'x', c.reason, 'e', text(c.touched),
  }
end

-- ------------------------------------------------------------------------- time

-- S12: 0 <= remaining <= duration under any clock; -1 stands for a forced state without end.
local function remaining(state, since, duration, now)
  if state ~= 'open' and state ~= 'forced_open' and state ~= 'forced_closed' then return 0 end
  if duration < 0 then return -1 end
  return math.max(0, math.min(since + duration - now, duration))
end

-- A clock that was set back restarts a timer at most once, instead of stopping it; freshness has
-- ended by then, once and for all.
local function rebase(x, c)
  if c.fresh and x.now - c.since >= FRESH then
    c.fresh = false
    x.dirty = true
  end
  if c.since > x.now then
    c.since = x.now
    x.dirty = true
  end
  for _, slot in ipairs(c.slots) do
    if slot.since > x.now then
      slot.since = x.now
      x.dirty = true
    end
  end
end

local function kept(list, keep)
  local out = {}
  for _, item in ipairs(list) do
    if keep(item) then out[#out + 1] = item end
  end
  return out
end

-- The ring and the half-windows move on with time. A clock that was set back leaves them as they
-- are, and reporters that were seen later than now are seen now.
local function roll(c, p, now)
  local index = div(now, math.max(1, div(p.window, BUCKETS)))
  if index < c.head then
    for _, r in ipairs(c.reporters) do r.last = math.min(r.last, now) end
  end
  local shift = math.min(index - c.head, BUCKETS)
  for _ = 1, shift do
    table.remove(c.ring)
    table.insert(c.ring, 1, {0, 0, 0})
  end
  c.head = index
  local half = div(now, math.max(1, div(p.window, 2)))
  if half > c.half then
    for _, r in ipairs(c.reporters) do
      r.prev = half == c.half + 1 and r.cur or 0
      r.cur = 0
    end
  end
  c.half = half
  c.reporters = kept(c.reporters, function(r)
    return r.id ~= '*' or r.cur + r.prev + r.run > 0
  end)
end

-- ------------------------------------------------------------------------- transitions

-- Reporters with an outcome in the last max(60 s, window).
local function active(c, p, now)
  local horizon, count = now - math.max(ACTIVE, p.window), 0
  for _, r in ipairs(c.reporters) do
    if r.id ~= '*' and r.last >= horizon then count = count + 1 end
  end
  return count
end

-- S2: v = max(now, v_store + 1, v_client + 1), with the step's nonce.
-- Every transition empties window, run, shares and slots, and ends fresh. Leaving closed forgets
-- the reporters that are no longer active and entering closed counts the others as seen now: the
-- time while nobody may call must not make one process look alone (S15).
local function transition(x, c, state, cause, duration)
  local p = x.policy
  roll(c, p, x.now)
  local calls, failures, slow = counts(c)
  local evidence = table.concat({
    text(calls), text(failures), text(slow), text(c.run), active(c, p, x.now),
  }, ' ')
  if c.state == 'closed' or c.state == 'forced_closed' then
    local horizon = x.now - math.max(ACTIVE, p.window)
    c.reporters = kept(c.reporters, function(r) return r.last >= horizon end)
  end
  local old = c.state
  c.v = math.max(x.now, c.v + 1, x.known.v + 1)
  c.nonce = x.nonce
  c.state = state
  c.since = x.now
  c.duration = duration
  c.successes = 0
  c.fresh = false
  c.slots = {}
  c.run = 0
  c.ring = empty_ring()
  c.reporters = kept(c.reporters, function(r) return r.id ~= '*' end)
  for _, r in ipairs(c.reporters) do
    if state == 'closed' then r.last = x.now end
    r.cur, r.prev, r.run = 0, 0, 0
  end
  local total
  if state == 'open' or state == 'forced_open' then
    total = INDEX.opens
  elseif state == 'half_open' then
    total = INDEX.half_opens
  else
    total = INDEX.closes
  end
  c.totals[total] = c.totals[total] + 1
  c.reason = cause .. ' ' .. text(x.now) .. ' ' .. x.detail
  x.dirty = true
  x.events[#x.events + 1] = {
    old = old, new = state, v = c.v, cause = cause, evidence = evidence, detail = x.detail,
  }
end

-- min(max, interval * multiplier^attempt) in whole steps, lengthened by the nonce's jitter.
local function open_duration(p, attempt, nonce)
  local duration = p.open_interval
  if p.open_interval_max > 0 then
    for _ = 1, attempt do
      duration = math.min(div(duration * p.backoff_multiplier, 100), p.open_interval_max)
    end
  end
  local most = div(duration * p.jitter, 10000)
  return duration + div(most * tonumber(string.sub(nonce, 1, 4), 16), 65536)
end

-- open_for is bounded by open_interval_max, or by 10 open intervals; it takes no jitter.
local function go_open(x, c, cause, attempt, open_for)
  local p = x.policy
  c.attempt = math.min(attempt, MAX_ATTEMPT)
  local duration = open_duration(p, c.attempt, x.nonce)
  if open_for > 0 then
    local most = p.open_interval_max > 0 and p.open_interval_max or 10 * p.open_interval
    duration = math.min(open_for, most)
  end
  transition(x, c, 'open', cause, duration)
end

-- A trip takes attempt 0 if the closed period lasted at least as long as the last open one.
local function trip(x, c, cause, open_for)
  local rested = x.now - c.since >= c.duration
  c.totals[INDEX.trips] = c.totals[INDEX.trips] + 1
  go_open(x, c, cause, rested and 0 or c.attempt + 1, open_for)
end

-- The client's knowledge becomes the store's; half_open counts as open with nothing left, and a
-- forced state that has run out as what follows it.
local function restore(x, c)
  local state, left = x.known.state, x.known.remaining
  if state == 'half_open' or (state == 'forced_open' and left == 0) then
    state, left = 'open', 0
  elseif state == 'closed' or (state == 'forced_closed' and left == 0) then
    state, left = 'closed', 0
  end
  c.attempt = x.known.attempt
  transition(x, c, state, 'restored', left)
  c.fresh = true
end

-- forced > open with time left > half_open (and open that is due) > closed.
local function rank(state, left)
  if state == 'forced_open' or state == 'forced_closed' then
    if left ~= 0 then return 3 end
    return state == 'forced_open' and 1 or 0
  end
  if state == 'open' then return left > 0 and 2 or 1 end
  return state == 'half_open' and 1 or 0
end

-- A client that knows a higher v proves that the store lost writes: its state wins.
-- While the circuit is fresh, other generations win too, if their state is more protective.
local function ratchet(x, c)
  local known = x.known
  if known.v > c.v then
    restore(x, c)
  elseif known.v > 0 and c.fresh and (known.v < c.v or known.nonce ~= c.nonce) then
    local left = remaining(c.state, c.since, c.duration, x.now)
    local theirs, ours = rank(known.state, known.remaining), rank(c.state, left)
    local longer = theirs == 2 and ours == 2 and known.remaining > left + FRESH_MARGIN
    if theirs > ours or longer then restore(x, c) end
  end
end

-- A forced state that has run out is released: forced_open goes on to half_open.
local function lapse(x, c)
  if c.state ~= 'forced_open' and c.state ~= 'forced_closed' then return end
  if remaining(c.state, c.since, c.duration, x.now) == 0 then
    transition(x, c, c.state == 'forced_open' and 'half_open' or 'closed', 'expired', 0)
  end
end

-- An offered policy is taken unless the stored version is higher; a new window starts empty, and a
-- lower success_threshold still asks for one more success (L2).
local function settle_policy(x, c)
  local offered, stored = x.offered, c.policy
  if not stored then
    c.policy = offered
    x.dirty = true
  elseif x.offer and offered.version >= stored.version and offered.text ~= stored.text then
    c.policy = offered
    x.policy = offered
    x.dirty = true
    c.successes = math.min(c.successes, offered.success_threshold - 1)
    if offered.window ~= stored.window then
      c.ring = empty_ring()
      for _, r in ipairs(c.reporters) do r.cur, r.prev = 0, 0 end
    end
  end
end

-- ------------------------------------------------------------------------- the trip rule

-- S15: with q >= 2, no reporter contributes more than its q-th part of what a trip needs.
local function agreed(x, c, need, run)
  local q = math.min(x.policy.quorum, active(c, x.policy, x.now))
  if q <= 1 then return true end
  need = math.max(need, q)
  local cap, total = div(need + q - 1, q), 0
  for _, r in ipairs(c.reporters) do
    local share = run and r.run or r.cur + r.prev
    total = total + (r.id == '*' and share or math.min(share, cap))
  end
  return total >= need
end

-- S9: the cause for which the circuit must trip now, or an empty text.
local function verdict(x, c)
  local p = x.policy
  if c.run >= p.failure_threshold and agreed(x, c, p.failure_threshold, true) then
    return 'run'
  end
  local calls, failures, slow = counts(c)
  if calls < p.minimum_calls then return '' end
  for _, rule in ipairs({{'rate', failures, p.failure_rate}, {'slow', slow, p.slow_call_rate}}) do
    local cause, bad, rate = rule[1], rule[2], rule[3]
    if rate > 0 and bad * 10000 >= rate * calls then
      local need = math.min(p.failure_threshold, div(rate * p.minimum_calls + 9999, 10000))
      if agreed(x, c, need, false) then return cause end
    end
  end
  return ''
end

-- The step's reporter, seen now. A full table loses the reporter with the smallest share, the least
-- recent first; what it loses goes to '*', so that many small shares still add up.
local function reporter_of(x, c)
  local own, rest, named, lost = nil, nil, 0, nil
  for _, r in ipairs(c.reporters) do
    if r.id == x.reporter then own = r end
    if r.id == '*' then
      rest = r
    else
      named = named + 1
      r.bad = r.cur + r.prev + r.run
      if not lost or r.bad < lost.bad or (r.bad == lost.bad and r.last < lost.last) then
        lost = r
      end
    end
  end
  if not own then
    own = {id = x.reporter, cur = 0, prev = 0, run = 0}
    if named >= REPORTERS then
      c.reporters = kept(c.reporters, function(r) return r ~= lost end)
      if lost.bad > 0 then
        if not rest then
          rest = {id = '*', last = 0, cur = 0, prev = 0, run = 0}
          c.reporters[#c.reporters + 1] = rest
        end
        rest.cur = rest.cur + lost.cur
        rest.prev = rest.prev + lost.prev
        rest.run = rest.run + lost.run
      end
    end
    c.reporters[#c.reporters + 1] = own
  end
  own.last = x.now
  return own
end

-- A good outcome ends the run, for every reporter. It takes nobody's place in a table full of
-- active reporters: there are as many as any quorum asks for.
local function add_good(x, c, count)
  local known = active(c, x.policy, x.now) < REPORTERS
  for _, r in ipairs(c.reporters) do known = known or r.id == x.reporter end
  if known then reporter_of(x, c) end
  c.ring[1][1] = c.ring[1][1] + count
  c.run = 0
  for _, r in ipairs(c.reporters) do r.run = 0 end
end

local FAILED = {f = true, F = true}
local SUCCEEDED = {s = true, S = true}
local SLOW = {S = true, F = true, I = true}

-- A bad outcome is a failure, or a slow call; a slow failure counts once.
local function add_bad(x, c, kind)
  local own, bucket = reporter_of(x, c), c.ring[1]
  bucket[1] = bucket[1] + 1
  if FAILED[kind] then bucket[2] = bucket[2] + 1 end
  if SLOW[kind] then bucket[3] = bucket[3] + 1 end
  c.run = c.run + 1
  own.run = own.run + 1
  own.cur = own.cur + 1
end

-- Every outcome counts in the totals, whatever generation it belongs to.
local function count_totals(x, c, kind, count)
  local t = c.totals
  x.dirty = true
  t[INDEX.calls] = t[INDEX.calls] + count
  if FAILED[kind] then
    t[INDEX.failures] = t[INDEX.failures] + count
    t[INDEX.last_failure] = x.now
  elseif SUCCEEDED[kind] then
    t[INDEX.last_success] = x.now
  else
    t[INDEX.ignored] = t[INDEX.ignored] + count
  end
  if SLOW[kind] then t[INDEX.slow] = t[INDEX.slow] + count end
end

-- Totals that only the client can count.
local function add_deltas(x, c)
  for _, delta in ipairs(x.deltas) do
    x.dirty = true
    c.totals[delta[1]] = c.totals[delta[1]] + delta[2]
  end
end

-- Record outcomes one after the other, judge after each, and return how many counted.
-- Good ones go in two pieces: the first ends with the call that completes minimum_calls (or is one
-- call: time may have made a rate true); after it, further good calls only lower a rate.
local function record(x, c, run)
  local kind, count = run.kind, run.count
  roll(c, x.policy, x.now)
  if kind == 'i' then
    if run.open_for > 0 and c.state == 'closed' then trip(x, c, 'retry_after', run.open_for) end
    return count
  end
  local done = 0
  while done < count do
    local part = 1
    if kind == 's' then
      part = count - done
      if done == 0 then
        part = math.min(part, math.max(1, x.policy.minimum_calls - counts(c)))
      end
      add_good(x, c, part)
    else
      add_bad(x, c, kind)
    end
    done = done + part
    if c.state == 'closed' then
      local cause = run.open_for > 0 and 'retry_after' or verdict(x, c)
      if cause ~= '' then
        trip(x, c, cause, run.open_for)
        return done
      end
    end
  end
  return done
end

-- ------------------------------------------------------------------------- operations

-- A batch counts only for its own generation while that is closed (or forced_closed).
-- S11: everything else is late and changes nothing but totals. An empty batch is a sync.
-- Without an age a run has -1: its calls began in this generation, however late it began.
local function report(x, c)
  add_deltas(x, c)
  for _, run in ipairs(x.batch) do
    count_totals(x, c, run.kind, run.count)
    local counted = 0
    local current = c.v == x.era.v and c.nonce == x.era.nonce
      and (c.state == 'closed' or c.state == 'forced_closed')
    if current and x.now - run.age >= c.since then
      counted = record(x, c, run)
    end
    c.totals[INDEX.late] = c.totals[INDEX.late] + run.count - counted
  end
  return 'ok', 0
end

-- S3, S4, S7: permits are leased, bounded by the policy, and never given before time.
local function acquire(x, c)
  local p = x.policy
  if c.state == 'closed' or c.state == 'forced_closed' then return 'go', 0 end
  local left = remaining(c.state, c.since, c.duration, x.now)
  if c.state == 'forced_open' or left > 0 then return 'deny', left end
  if c.state == 'open' then transition(x, c, 'half_open', 'due', c.duration) end
  local live, shortest = 0, MAX_DENY
  for _, slot in ipairs(c.slots) do
    local lease = math.max(0, slot.since + slot.lease - x.now)
    if slot.token == x.token then return 'grant', lease end
    if lease > 0 then
      live = live + 1
      shortest = math.min(shortest, lease)
    end
  end
  if live < p.half_open_permits and c.successes + live < p.success_threshold then
    local mine = {token = x.token, since = x.now, lease = p.permit_lease}
    if #c.slots < p.half_open_permits then
      c.slots[#c.slots + 1] = mine
    else
      for i, slot in ipairs(c.slots) do
        if slot.since + slot.lease <= x.now then
          c.slots[i] = mine
          break
        end
      end
    end
    x.dirty = true
    return 'grant', p.permit_lease
  end
  return 'deny', shortest - div(shortest * tonumber(string.sub(x.nonce, 5, 8), 16), 131072)
end

-- S5, S6: a token counts once, in its own generation.
-- One failure or slow probe reopens. A settle that finds no permit changes nothing, totals included:
-- it may have been carried out before, and only its client knows whether it was sent once.
local function settle(x, c)
  local kind, p, mine = x.kind, x.policy, false
  for _, s in ipairs(c.slots) do
    if s.token == x.token then mine = true end
  end
  local current = c.v == x.era.v and c.nonce == x.era.nonce
  if not current or c.state ~= 'half_open' or not mine then return 'stale', 0 end
  c.slots = kept(c.slots, function(s) return s.token ~= x.token end)
  add_deltas(x, c)
  count_totals(x, c, kind, 1)
  c.totals[INDEX.probes] = c.totals[INDEX.probes] + 1
  if kind == 's' then
    c.successes = c.successes + 1
    if c.successes >= p.success_threshold then
      transition(x, c, 'closed', 'recovered', c.duration)
    end
  elseif kind ~= 'i' or x.open_for > 0 then
    local cause = x.open_for > 0 and 'retry_after' or 'probe'
    go_open(x, c, cause, c.attempt + 1, x.open_for)
  end
  return 'ok', 0
end

-- R2: gives back a permit whose grant never arrived.
local function cancel(x, c)
  local rest = kept(c.slots, function(s) return s.token ~= x.token end)
  if #rest == #c.slots then return 'noop', 0 end
  c.slots = rest
  x.dirty = true
  return 'ok', 0
end

-- An operator's word: forced_open or forced_closed, for ttl ms or without end (-1).
local function override(x, c)
  transition(x, c, x.kind, x.kind, x.ttl)
  return 'ok', 0
end

-- forced_open goes to half_open, never straight to closed; forced_closed goes to closed.
local function release(x, c)
  if c.state ~= 'forced_open' and c.state ~= 'forced_closed' then return 'noop', 0 end
  transition(x, c, c.state == 'forced_open' and 'half_open' or 'closed', 'released', 0)
  return 'ok', 0
end

-- Closed, attempt 0, from any state.
local function reset(x, c)
  c.attempt = 0
  transition(x, c, 'closed', 'reset', 0)
  return 'ok', 0
end

local OPERATIONS = {
  report = report,
  acquire = acquire,
  settle = settle,
  cancel = cancel,
  override = override,
  release = release,
  reset = reset,
}

-- ------------------------------------------------------------------------- the step

-- An unknown circuit is created from what the client knows, or closed; fresh either way.
local function create(x)
  local c = {
    v = 0, attempt = 0, n = 0, head = 0, run = 0, ring = empty_ring(), half = 0, reporters = {},
    totals = {},
  }
  for i = 1, #NAMES do c.totals[i] = 0 end
  if x.known.v > 0 then
    restore(x, c)
  else
    transition(x, c, 'closed', 'created', 0)
    c.fresh = true
  end
  c.totals[INDEX.closes] = 0
  x.events[1].old = ''
  return c
end

-- Idle circuits expire after 7 days, refreshed hourly; never while forced without end.
-- Returns the ms for PEXPIRE, -1 for PERSIST, 0 for neither.
local function expiry(x, c)
  if c.duration < 0 then
    c.touched = 0
    return #x.events > 0 and -1 or 0
  end
  if #x.events == 0 and c.touched <= x.now and x.now < c.touched + HOUR then return 0 end
  c.touched = x.now
  local left = remaining(c.state, c.since, c.duration, x.now)
  return math.max(WEEK, left + x.policy.window)
end

-- ------------------------------------------------------------------------- arguments

local KINDS = {s = true, S = true, f = true, F = true, i = true, I = true}

local function read_known(line)
  local p = split(line, '%S+')
  local known = {
    v = whole(p[1], 0, MAX_NUMBER), nonce = p[2], state = p[3],
    remaining = whole(p[4], -1, MAX_SPAN), attempt = whole(p[5], 0, MAX_ATTEMPT),
  }
  local endless = known.remaining == -1 and p[3] ~= 'forced_open' and p[3] ~= 'forced_closed'
  if #p ~= 5 or not known.v or not STATES[p[3]] or not known.remaining or not known.attempt
    or endless then
    return nil
  end
  return known
end

local function read_era(line)
  local v, nonce = string.match(line or '', '^(%d+) ([%w-]+)$')
  v = whole(v, 0, MAX_NUMBER)
  return v and {v = v, nonce = nonce}
end

-- One run of a batch: <kind><count>[*<open_for>][@<age>].
local function read_run(token)
  local head, age = string.match(token, '^([^@]+)@(%d+)$')
  local body, open_for = string.match(head or token, '^([^*]+)%*(%d+)$')
  local kind, count = string.match(body or head or token, '^(%a)(%d+)$')
  return {
    kind = kind, count = whole(count, 1, MAX_COUNT),
    open_for = whole(open_for, 1, MAX_SPAN) or (not open_for and 0),
    age = whole(age, 0, MAX_SPAN) or (not age and -1),
  }
end

local function read_batch(line)
  local batch, bad = {}, 0
  for token in string.gmatch(line, '%S+') do
    local run = read_run(token)
    if not KINDS[run.kind] or not run.count or not run.open_for or not run.age
      or (run.open_for > 0 and run.count > 1) then
      return nil
    end
    if run.kind ~= 's' and run.kind ~= 'i' then bad = bad + run.count end
    batch[#batch + 1] = run
    if #batch > MAX_TOKENS or bad > MAX_BAD then return nil end
  end
  return batch
end

local function read_deltas(line)
  local deltas = {}
  for token in string.gmatch(line, '%S+') do
    local name, count = string.match(token, '^([%w_]+):(%d+)$')
    count = whole(count, 0, MAX_NUMBER)
    if not CLIENT_COUNTS[name] or not count or #deltas >= #NAMES then return nil end
    deltas[#deltas + 1] = {INDEX[name], count}
  end
  return deltas
end

local function name_of(value)
  return value and string.find(value, '^[%w_-]+$') and #value <= MAX_NAME and value
end

-- Where each operation's own arguments stand, behind the common ones.
local ARGUMENTS = {
  report = {'era', 'reporter', 'batch', 'deltas', 'detail'},
  acquire = {'token'},
  settle = {'era', 'token', 'kind', 'open_for', 'deltas', 'detail'},
  cancel = {'token'},
  override = {'forced', 'ttl', 'detail'},
  release = {'detail'},
  reset = {'detail'},
}

local READ = {
  era = read_era,
  reporter = name_of,
  token = name_of,
  batch = function(value) return value and read_batch(value) end,
  deltas = function(value) return value and read_deltas(value) end,
  detail = function(value) return value and #value <= MAX_DETAIL and value end,
  kind = function(value) return KINDS[value] and value end,
  open_for = function(value) return whole(value, 0, MAX_SPAN) end,
  forced = function(value)
    return (value == 'forced_open' or value == 'forced_closed') and value
  end,
  ttl = function(value)
    local ttl = whole(value, -1, MAX_SPAN)
    return ttl ~= 0 and ttl
  end,
}

-- Reads every argument before anything is written; the second result names the malformed one.
local function read_arguments()
  local x = {events = {}, dirty = false, detail = '', deltas = {}}
  x.op, x.nonce, x.channel, x.name = ARGV[1], ARGV[3], ARGV[4], ARGV[5]
  if not OPERATIONS[x.op] then return nil, 'operation' end
  if ARGV[2] ~= '' then
    x.now = whole(ARGV[2], 0, MAX_TIME)
    if not x.now then return nil, 'now' end
  end
  if not string.find(x.nonce or '', '^%x%x%x%x%x%x%x%x$') then return nil, 'nonce' end
  x.known = read_known(ARGV[6] or '')
  if not x.known then return nil, 'known' end
  x.offered = load_policy(ARGV[7] or '')
  if not x.offered then return nil, 'policy' end
  if ARGV[8] ~= '1' and ARGV[8] ~= '0' then return nil, 'offer' end
  x.offer = ARGV[8] == '1'
  for i, name in ipairs(ARGUMENTS[x.op]) do
    x[name] = READ[name](ARGV[8 + i])
    if not x[name] then return nil, name end
  end
  x.kind = x.forced or x.kind
  return x
end

-- ------------------------------------------------------------------------- after-effects

-- Runs one command that may fail without undoing the step; notes the error's code.
local function effect(failed, ...)
  local result = redis.pcall(...)
  if type(result) == 'table' and result.err then
    local code = string.match(refusal(result.err), '^%u+') or 'ERR'
    failed[#failed + 1] = string.lower((...)) .. '=' .. code
  end
end

-- The state is written first and whole; log, expiry and push may fail on their own.
local function save(x, c)
  local failed = {}
  if not x.dirty then return '' end
  c.n = c.n + 1
  local ttl = expiry(x, c)
  local saved = redis.pcall('HSET', KEYS[1], unpack(dump(c)))
  if type(saved) == 'table' and saved.err then return nil, refusal(saved.err) end
  for _, e in ipairs(x.events) do
    effect(failed, 'XADD', KEYS[2], 'MAXLEN', LOG_LENGTH, '*', 'old', e.old, 'new', e.new,
      'v', text(e.v), 'at', text(x.now), 'cause', e.cause, 'evidence', e.evidence,
      'detail', e.detail)
  end
  if ttl > 0 then
    effect(failed, 'PEXPIRE', KEYS[1], text(ttl))
    effect(failed, 'PEXPIRE', KEYS[2], text(ttl))
  elseif ttl < 0 then
    effect(failed, 'PERSIST', KEYS[1])
    effect(failed, 'PEXPIRE', KEYS[2], text(WEEK))
  end
  if #x.events > 0 then
    effect(failed, 'PUBLISH', x.channel, x.name .. ' ' .. dump_header(c))
  end
  return table.concat(failed, ' ')
end

local function step()
  local x, wrong = read_arguments()
  if not x then return redis.error_reply('CBARG argument ' .. wrong .. ' is malformed') end
  local c, problem = load()
  if problem then return redis.error_reply(problem) end
  -- A v beyond any clock's could not be followed by another one; the store's own may be.
  if x.known.v > MAX_TIME and not (c and x.known.v <= c.v) then
    return redis.error_reply('CBARG argument known is malformed')
  end
  if not x.now then
    local t = read_clock()
    if t.err then return redis.error_reply(refusal(t.err)) end
    x.now = tonumber(t[1]) * 1000 + div(tonumber(t[2]), 1000)
  end
  local old = c and c.state or ''
  if c then
    x.policy = c.policy or x.offered
    rebase(x, c)
    ratchet(x, c)
    lapse(x, c)
  else
    x.policy = x.offered
    c = create(x)
  end
  settle_policy(x, c)
  local word, value = OPERATIONS[x.op](x, c)
  local failed, refused = save(x, c)
  if refused then return redis.error_reply(refused) end
  local stored = x.policy.text
  return {
    dump_header(c),
    text(x.now),
    text(remaining(c.state, c.since, c.duration, x.now)),
    old,
    #x.events > 0 and x.events[#x.events].cause or '',
    word,
    text(value),
    stored == x.offered.text and '' or stored,
    failed,
  }
end

return step()
