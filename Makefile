# The two commands of a fresh machine are `make demo` and `make test`; .venv is made on the way.
.PHONY: demo test lint format

demo:
	@tools/bootstrap
	.venv/bin/dcnr demo

test:
	@tools/bootstrap test
	.venv/bin/python -m pytest -n 2

lint:
	@tools/bootstrap test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format:
	@tools/bootstrap test
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
