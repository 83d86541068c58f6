"""An elastic training platform for Ray: workers come and go, the result stays the same to the bit."""
