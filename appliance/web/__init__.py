"""HTTP: routes, the error object, streaming, and the contained server. No decisions here."""
