"""highspy, imported when its first name is asked for: the import is slow, and many problems never need HiGHS."""

from __future__ import annotations

from typing import Any


class _Highspy:
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by tools that look at every object they meet
            raise AttributeError(name)
        try:
            import highspy
        except ImportError as error:
            raise ImportError(f"this problem needs HiGHS ({error}); wanted: pip install highspy") from error
        return getattr(highspy, name)


highspy = _Highspy()
