"""What others vouch for: reference values, certificates, revocation. Fetched, cached, bounded."""
