"""Where metrics go: metrics.csv always, and any of Lightning's loggers besides."""
