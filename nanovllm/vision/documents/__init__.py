"""Documents: pages to pixels, and their text layers. PDFs, multi-page TIFFs, and images as documents of one page."""
