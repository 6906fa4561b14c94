"""``ppsr web``: a page in the browser that enlarges pictures on this machine."""
