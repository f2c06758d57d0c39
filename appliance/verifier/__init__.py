"""The relying party: fetches, checks and shows. Needs no server, engine or device."""
