"""What comes in: images, annotations, stains, the cohort table, made fields."""
