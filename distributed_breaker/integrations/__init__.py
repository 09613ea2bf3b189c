"""Web frameworks and Celery: each module here needs its framework, and no other imports it."""
