"""Looking at data as training gets them: one step as a web page, a stage as figures."""
