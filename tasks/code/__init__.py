"""Task pack: code. One file per task."""
