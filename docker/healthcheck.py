"""Health check of the images: exit status 0 when vLLM's /health answers on $PORT (8000)."""

import os
import sys
import urllib.error
import urllib.request

try:
    urllib.request.urlopen(f"http://127.0.0.1:{os.environ.get('PORT', '8000')}/health", timeout=5)
except (OSError, urllib.error.URLError) as error:
    sys.exit(f"not healthy: {error}")
