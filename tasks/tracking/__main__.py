from tasks.tracking.upload import main

main()
