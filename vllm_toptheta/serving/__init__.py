"""The server side: per-request options, counts in responses, and the page at /toptheta."""
