"""Measures speed and cost beside other breakers: ``make bench``, or ``make bench ARGS=--quick``.

Each topic is a module with a function ``run`` from ``Setting`` to ``Topic``:

=========  ==========================================================================
calls      time added to a call, closed and rejected, in each form
threads    calls of 1, 4 and 16 threads, and lost counts
traffic    the server's commands, bytes and time per call, at three rates
trips      how fast a trip reaches 2, 8 and 32 other processes
outage     the longest call while the server is killed, stopped or slow, and back
recovery   what reaches a dead dependency, probes, and time to all closed
circuits   memory and time for 1, 100 and 10,000 circuits
startup    import, first answer, memory
=========  ==========================================================================

``subjects`` puts ours and the peers (``peers``) behind one interface.  ``figures`` judges each row:
ahead, level or behind the best peer; a row that is behind needs a reason in ``reasons``.  ``pages``
and ``plots`` write what was found.  Figures mean something only beside others of the same run.
"""
