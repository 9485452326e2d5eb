"""Task pack: planning. One file per task."""
