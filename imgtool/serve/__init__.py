"""An engine over HTTP: one core for every server, with limits, and without state between requests.

``Service.answer`` takes a ``Request`` and gives a ``Reply``, whatever the server; ``wsgi`` is one for WSGI.
``python -m imgtool.serve`` runs that in the folder that ``imgtool export ENGINE --to docker`` wrote.
"""

from imgtool.serve.request import Limits, Refused, Reply, Request
from imgtool.serve.service import CONFIG, Config, Service, served

__all__ = ["CONFIG", "Config", "Limits", "Refused", "Reply", "Request", "Service", "served"]
