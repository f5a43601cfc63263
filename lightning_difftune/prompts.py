"""What is asked of a text-to-image model where nothing in particular is."""

DEFAULT_PROMPT = "a high-quality, detailed, and professional image"  # ControlNet's authors', and the paper's (App. C)
