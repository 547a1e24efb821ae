"""The document between fit and export: what was mixed, with which weights, and how it was found."""
