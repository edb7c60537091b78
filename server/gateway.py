"""The gateway: Debian's nginx in front of Flower's SuperLink, which lets only a site's own routes through.

SuperLink serves sites, run control and its own workers on one port, and control has no authentication. So it listens on
127.0.0.1 alone, and hospitals reach this gateway. All paths in the configuration are relative, so the folder may be
moved or mounted elsewhere: certificates beside nginx.conf, logs and temporary files in DIR/state/gateway.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
from importlib import metadata

from server.federation import Federation, Folder
from shared import __version__
from shared.errors import UserError

# What a SuperNode with a key of its own calls. Flower's two others, register-node and unregister-node, are for nodes
# without a key; with node authentication SuperLink refuses them anyway.
ROUTES = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "get-fab",
    "get-run",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "send-node-heartbeat",
)
BODY_MIB = 8  # the largest request; Flower cuts arrays into pieces of 5 MiB
REQUESTS = 200  # a second from one address; more wait their turn
CONNECTIONS = 64  # requests at a time from one address; above that 503, on which a SuperNode tries again

_CONFIGURATION = """\
# The gateway of the federation {name}, written by `consilium provision`; changes made here are overwritten.
# nginx -p DIR/state/gateway/ -c DIR/server/nginx.conf
daemon off;
worker_processes 2;
worker_shutdown_timeout 30s;
pid nginx.pid;
error_log error.log warn;

events {{
    worker_connections 2048;
}}

http {{
    client_body_temp_path body-temp;
    proxy_temp_path proxy-temp;
    fastcgi_temp_path fastcgi-temp;
    uwsgi_temp_path uwsgi-temp;
    scgi_temp_path scgi-temp;
    types {{ }}
    default_type text/plain;
    server_tokens off;

    # A site asks for work every few seconds, and a model travels in hundreds of parts: not worth a line each.
    map "$status $uri" $told {{
        "~^200 /v1/fleet/(pull-messages|send-node-heartbeat|pull-object|push-object)$" 0;
        "~^200 /(health|consilium)$" 0;
        default 1;
    }}
    log_format gateway '$time_iso8601 $remote_addr "$request_method $uri" $status in=$request_length out=$bytes_sent '
                       '$request_time s $ssl_protocol';
    access_log access.log gateway if=$told;

    # 503, not 429 or 403: on 503 a SuperNode waits and tries again, on the others it gives up or forgets the run.
    limit_req_zone $binary_remote_addr zone=requests:4m rate={requests}r/s;
    limit_req zone=requests burst={connections};
    limit_req_status 503;
    limit_req_log_level warn; # of those refused; of those that only waited one level less, which is not written
    limit_conn_zone $binary_remote_addr zone=connections:4m;
    limit_conn connections {connections};
    limit_conn_status 503;

    client_max_body_size {body}m;
    client_body_buffer_size 6m; # Flower's largest part whole, so that none goes by way of the disk, with a warning each
    client_header_buffer_size 4k;
    large_client_header_buffers 4 8k;
    client_header_timeout 15s;
    client_body_timeout 30s;
    send_timeout 30s;
    keepalive_timeout 75s;
    keepalive_requests 10000;
    reset_timedout_connection on;

    upstream superlink {{
        server 127.0.0.1:{internal_port};
    }}

    server {{
        listen {listen}:{port} ssl{only};
        ssl_certificate server.crt;
        ssl_certificate_key server.key;
        ssl_protocols TLSv1.3;
        ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256;
        ssl_ecdh_curve X25519:prime256v1:secp384r1;
        ssl_session_tickets off;
        ssl_session_cache shared:tls:2m;
        ssl_session_timeout 1h;

        add_header Strict-Transport-Security "max-age=31536000" always;
        add_header X-Content-Type-Options nosniff always;
        add_header Content-Security-Policy "default-src 'none'; frame-ancestors 'none'" always;
        add_header Cache-Control no-store always;

        # Flower's SuperLink asks for TLS, too, even on 127.0.0.1.
        proxy_http_version 1.1;
        proxy_set_header Host localhost;
        proxy_set_header X-Forwarded-For $remote_addr;
        proxy_set_header X-Forwarded-Proto https;
        proxy_set_header Forwarded "";
        proxy_set_header Accept-Encoding "";
        proxy_ssl_protocols TLSv1.2 TLSv1.3;
        proxy_ssl_trusted_certificate ../ca/ca.crt;
        proxy_ssl_verify on;
        proxy_ssl_name localhost;
        proxy_connect_timeout 5s;
        proxy_send_timeout 60s;
        proxy_read_timeout 60s;
        proxy_next_upstream off;
        proxy_max_temp_file_size 0;

        error_page 497 =400 @plain;
        error_page 400 @bad;
        error_page 404 @closed;
        error_page 405 @method;
        error_page 408 @slow;
        error_page 413 @large;
        error_page 502 504 @down;
        error_page 503 @busy;

        # Only the part that was matched goes on, never what the caller wrote around it.
        location ~ "^/v1/fleet/({routes})$" {{
            if ($request_method != POST) {{
                return 405;
            }}
            proxy_pass https://superlink/v1/fleet/$1;
        }}
        location = /health {{
            if ($request_method !~ "^(GET|HEAD)$") {{
                return 405;
            }}
            proxy_pass https://superlink/health;
        }}
        location = /consilium {{
            if ($request_method !~ "^(GET|HEAD)$") {{
                return 405;
            }}
            default_type application/json;
            return 200 '{about}';
        }}
        location / {{
            return 404;
        }}

        location @plain {{ return 400 "This port speaks HTTPS only: begin the address with https://\\n"; }}
        location @bad {{ return 400 "This is no request that can be understood.\\n"; }}
        location @closed {{ return 404 "Not served here.\\n"; }}
        location @method {{ return 405 "Not served by this method.\\n"; }}
        location @slow {{ return 408 "The request took too long to arrive.\\n"; }}
        location @large {{ return 413 "The request is larger than {body} MiB.\\n"; }}
        location @down {{ return 502 "The federation's server does not answer; try again later.\\n"; }}
        location @busy {{ return 503 "Too many requests at once; try again later.\\n"; }}
    }}
}}
"""


def configuration(federation: Federation) -> str:
    """The whole of nginx.conf."""
    about = {"federation": federation.name, "version": __version__, "flwr": metadata.version("flwr")}
    v6 = ":" in federation.listen
    return _CONFIGURATION.format(
        name=federation.name,
        listen=f"[{federation.listen}]" if v6 else federation.listen,
        only=" ipv6only=off" if federation.listen == "::" else "",
        port=federation.port,
        internal_port=federation.internal_port,
        routes="|".join(ROUTES),
        about=json.dumps(about),  # names and versions: no quote, backslash or dollar can be in them
        requests=REQUESTS,
        connections=CONNECTIONS,
        body=BODY_MIB,
    )


def command(folder: Folder, *more: str) -> list[str]:
    """The words that start the gateway in the foreground; more: ``-t`` checks its files, ``-s reload`` reads them anew.

    Makes DIR/state/gateway, where nginx keeps its process id and logs.

    Raises:
        UserError: nginx is not installed.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise UserError("nginx is not installed; on Debian and Ubuntu: apt install nginx-light")
    folder.gateway.mkdir(parents=True, exist_ok=True)
    words = [program, "-p", f"{folder.gateway.resolve()}/", "-c", str(folder.nginx_conf.resolve()), "-e", "stderr"]
    if os.geteuid() == 0:  # else its workers become another user, who may not read this folder
        words += ["-g", f"user {pwd.getpwuid(0).pw_name};"]
    return [*words, *more]
