"""The paper's figures: multiply-adds, pure shares, tables, plots, and a small controlled study."""
