"""Task pack: math. One file per task."""
