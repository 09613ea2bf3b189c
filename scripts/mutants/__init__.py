"""Mutants: small changes of the two twins, each of which the tests must find.

===================  ============================================================================
``mutant.py``        one change of one file: where, what, and the name that it keeps
``lua_syntax.py``    a parser for the Lua of ``lua/breaker.lua``
``lua.py``           the mutants of the script
``python.py``        the mutants of the model
``judge.py``         whether the tests find a mutant
``pool.py``          judges in processes of their own, which may hang or die
``equivalent.toml``  the mutants that behave as the original does, each with the reason
``equivalents.py``   reads that list, and finds what is wrong with it
``report.py``        what came out
===================  ============================================================================
"""
