"""`authenticate`, once per kind of evidence: signature, chain to a pinned root, well-formedness.

What comes out are claims that the vendor's key has signed. Whether they are good ones is asked
in `rats.policy`.
"""
