"""An OpenAI-style HTTP server that steers: `fastsae serve`, or `create_app` for one of your own.

policies.py what requests may name · engine.py the model, in continuous batches ·
steering/control.py who is steered · app.py the routes · admin.py theirs · metrics.py, audit.py what
happened.
"""
