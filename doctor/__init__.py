"""`harness doctor`: does everything work here that a run needs, and do the evaluators give the answers that are known?"""
