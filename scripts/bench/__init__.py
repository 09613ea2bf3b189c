"""Measures speed and cost: ``make bench``, or ``make bench ARGS="--quick"``.

The figures are printed beside their targets and judged by nobody: what they mean depends on the
machine, so they are compared within one run only.  Each topic is a module of its own:

========  ==========================================================================
calls     time added to a call, closed and rejected, beside other breakers in memory
store     commands and bytes per call, and how fast a trip reaches other processes
outage    the longest wait of a call while the server hangs or is gone
========  ==========================================================================

A topic is a function from ``Setting`` to a ``Table``; a new one is added to ``TOPICS`` in
``__main__``.
"""
