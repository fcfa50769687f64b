"""Other libraries' models and formats. Each module needs its library, and is imported only on request."""
