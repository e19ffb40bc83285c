"""`python -m maisi_cli`, and the console script `maisi`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
