"""A fleet that shares one circuit, seen at work: ``python -m scripts.demo`` or ``make demo``.

========  ==========================================================================
rules     the circuit, its policy and the fleet's size
upstream  a flaky HTTP service, in a process of its own
worker    one process of the fleet: calls the upstream through the circuit
fleet     the parent's side of all these processes: starts them and hears their reports
screen    narration, and a live table where there is a terminal
acts      what happens, and what must come of it
========  ==========================================================================

Everything that is printed is measured in that run.  The processes that are started end when their
standard input does, so none of them outlives the demo, however that ends.
"""
