"""Where the packages' own words go: to the standard error of their process, with the time.

Ray keeps each worker's standard error as a file of the session's logs and shows it in the
dashboard. Python by itself would drop whatever is not a warning.
"""

from __future__ import annotations

import logging

PACKAGES = ("cluster", "serve_apps", "train_jobs")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def speak() -> None:
    """Have this process say what its packages have to tell, from INFO on. Idempotent."""
    for package in PACKAGES:
        logger = logging.getLogger(package)
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter(FORMAT))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
