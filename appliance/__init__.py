"""DCV: one appliance image for confidential, verifiable LLM inference.

Layers, top to bottom; imports only ever point down (`just lint` checks it):

    cli -> run -> boot -> web -> serving | verifier -> attester | engine | endorsements
        -> rats -> wire -> config | log | notify -> errors

Nothing inside the package imports this facade.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
