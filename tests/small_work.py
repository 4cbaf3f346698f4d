"""The process of one job, over the fakes."""

from __future__ import annotations

import sys

from server.home import Home
from server.work import main
from tests.small_home import FakeModels

if __name__ == "__main__":
    main(sys.argv[1], lambda settings: Home(settings, FakeModels(settings)))
