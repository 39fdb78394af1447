"""An ORCA out-of-band server on grpcio, with xds-protos' own descriptors: `orca_server.py ADDRESS CPU`.

A line on standard input is the CPU utilization from then on. Nothing of trimtab is in it.
"""

import sys
import threading
from concurrent import futures

import grpc
from xds.data.orca.v3 import orca_load_report_pb2
from xds.service.orca.v3 import orca_pb2

state = {"cpu": float(sys.argv[2])}


def stream_core_metrics(request, context):
    """As gRPC's own: a report at once, and one at each interval; here of at least 100 ms."""
    ended = threading.Event()
    context.add_callback(ended.set)
    interval = max(request.report_interval.ToTimedelta().total_seconds(), 0.1)
    while not ended.is_set():
        yield orca_load_report_pb2.OrcaLoadReport(
            cpu_utilization=state["cpu"],
            mem_utilization=0.25,
            rps_fractional=100.0,
            utilization={"queue": 0.5},
        )
        ended.wait(interval)


def main():
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    handler = grpc.unary_stream_rpc_method_handler(
        stream_core_metrics,
        request_deserializer=orca_pb2.OrcaLoadReportRequest.FromString,
        response_serializer=orca_load_report_pb2.OrcaLoadReport.SerializeToString,
    )
    service = orca_pb2.DESCRIPTOR.services_by_name["OpenRcaService"].full_name
    handlers = {"StreamCoreMetrics": handler}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    server.add_insecure_port(sys.argv[1])
    server.start()
    print("ready", flush=True)
    for line in sys.stdin:
        state["cpu"] = float(line)
    server.stop(0)


main()
