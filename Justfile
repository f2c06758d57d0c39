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

# Every number that was asked for, and the gateway beside others, in an environment of their own (minutes)
[group('check')]
bench: setup
    @python3 image/development/setup.py --only bench
    {{python}} tests/bench/run.py

# The same without the other gateways, in under a minute
[group('check')]
bench-quick: setup
    {{python}} tests/bench/run.py --quick

# How long verification takes, beside what was asked for
[group('check')]
bench-verify: setup
    {{python}} tests/bench/verification.py

# Fuzz every parser, or those named (needs atheris: tests/fuzz/README.md)
[group('check')]
fuzz interpreter="/tmp/fuzz/bin/python" seconds="60" *NAMES:
    {{interpreter}} tests/fuzz/run.py --seconds {{seconds}} {{NAMES}}

# Everything that decides whether a change lands
[group('check')]
ci: setup lint test docs-check

# Compile the locks anew from pyproject.toml (needs uv)
[group('maintain')]
lock *NAMES:
    python3 image/locks/compile {{NAMES}}

# Write the generated vectors anew: other keys, the same meaning
[group('maintain')]
vectors: setup
    {{python}} tests/vectors/generate.py

# Build an image (needs image/build-packages.txt)
[group('image')]
image profile="test" *ARGS: setup
    {{python}} image/build.py {{profile}} {{ARGS}}

# Boot the test image in QEMU, with a software TPM, in the foreground
[group('image')]
image-boot *ARGS:
    {{python}} image/boot.py image/out/test/dcv-test.raw {{ARGS}}

# Predict what a machine must show that runs a UKI
[group('image')]
image-measure *ARGS:
    {{python}} -m image.measure {{ARGS}}

# Boot the built test image and others that must be refused, and look at them from outside (minutes)
[group('image')]
image-test *ARGS:
    {{python}} -m pytest -q tests/image/test_boot.py tests/image/test_model_volume.py {{ARGS}}

# Build an image twice and compare every hash
[group('image')]
image-reproduce profile="test": setup
    {{python}} image/reproduce.py {{profile}}
