"""A configuration of gunicorn that makes threads greenlets before anything else is loaded."""

from gevent import monkey

monkey.patch_all()
