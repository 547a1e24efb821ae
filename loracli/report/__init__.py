"""One HTML file that tells a recipe's story: no script, nothing from elsewhere, light and dark, for a phone too."""
