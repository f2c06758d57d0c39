"""`python -m appliance` is `dcv`."""

from appliance.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
