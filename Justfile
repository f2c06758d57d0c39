# Every way to work with this repository. Bare `just` lists them; CI runs exactly `just ci`.

python := ".venv/bin/python"

_list:
    @just --list --unsorted

# Install the three environments and the embedded model, from locks; quick when done before
[group('run')]
setup *ARGS:
    @python3 image/development/setup.py {{ARGS}}

# Boot the appliance with the real SGLang and ask it a question through the openai package
[group('run')]
demo: setup
    @{{python}} image/development/demo.py

# Serve in the foreground at https://127.0.0.1:8443 (`--engine fake` for quick work)
[group('run')]
serve *ARGS: setup
    @{{python}} image/development/serve.py {{ARGS}}

# What the appliance started by `just serve` is doing
[group('run')]
status *ARGS:
    @.venv/bin/dcv status --socket .run/status.sock {{ARGS}}

# Run the tests; arguments go to pytest, e.g. `just test -m 'not engine'`
[group('check')]
test *ARGS: setup
    {{python}} -m pytest {{ARGS}}

# Format the code
[group('check')]
fmt:
    {{python}} -m ruff format .
    {{python}} -m ruff check --fix .

# Style, types and layers
[group('check')]
lint:
    {{python}} -m ruff format --check .
    {{python}} -m ruff check .
    {{python}} -m mypy
    .venv/bin/lint-imports --no-cache

# Tests without the real engine, with branch coverage of the package
[group('check')]
cover: setup
    {{python}} -m coverage erase
    {{python}} -m coverage run -m pytest -m 'not engine'
    {{python}} -m coverage combine -q
    {{python}} -m coverage report

# Write the reference pages that come from the source
[group('maintain')]
docs:
    {{python}} docs/generate.py

# Documentation: links, help texts and the commands the README names
[group('check')]
docs-check:
    {{python}} -m pytest -q tests/test_docs.py

# Everything that decides whether a change lands
[group('check')]
ci: setup lint test docs-check

# Compile the locks anew from pyproject.toml (needs uv)
[group('maintain')]
lock *NAMES:
    python3 image/locks/compile {{NAMES}}
