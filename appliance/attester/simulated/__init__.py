"""Simulated hardware: the vendors' real formats, signed under a published test root.

Nothing here protects anything: the keys lie beside the code, for everyone to read. What it makes
is a scheme of its own, `simulated`, which no production policy affirms; and the image build drops
every file and folder whose name begins with `simulated`, so that a production image cannot make
or accept it.
"""
