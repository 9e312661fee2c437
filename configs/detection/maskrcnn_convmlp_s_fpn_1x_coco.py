# ./dist_detection.sh configs/detection/maskrcnn_convmlp_s_fpn_1x_coco.py 8 /path/to/COCO
# Published: box AP 38.4 (AP50 59.8, AP75 41.8), mask AP 35.7 (56.7, 38.2); 28.7 M parameters
_base_ = ["_base_/maskrcnn_fpn.py", "_base_/coco_instance.py", "_base_/schedule_1x.py", "_base_/runtime.py"]
