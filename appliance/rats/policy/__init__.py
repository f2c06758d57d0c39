"""Appraisal: small classes, each holding claims to one rule and saying what it found."""
