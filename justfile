# Everyday commands; see each with  just --list

test:
    pytest -q

slow:
    pytest -q -m slow

lint:
    ruff check . && ruff format --check . && mypy && lint-imports

ci:
    .ci/run
