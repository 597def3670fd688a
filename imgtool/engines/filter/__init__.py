"""The filter engine: small networks that imitate classical filters."""
